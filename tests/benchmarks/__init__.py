"""The benchmarks against golden values; `conftest.py` says where those lie."""
