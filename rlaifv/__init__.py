"""RLAIF-V as batch jobs: the library. Start reading at `rlaifv/pipeline.py`."""

__version__ = "0.1.0"
