"""Low-rank adapter layers for any PyTorch model: injection, stacked storage, exchange with PEFT."""
