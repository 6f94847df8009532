"""The FastAPI service around one frozen base model and its LoRA adapters."""

__version__ = "0.1.0"
