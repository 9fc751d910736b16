"""The paper's claim tested in the open: does learning to draw an image help to answer questions about it?"""
