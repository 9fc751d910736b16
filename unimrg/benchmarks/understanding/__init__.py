"""Benchmarks that ask about pictures, in VLMEvalKit's file formats and by its rules."""
