"""Processes that torchrun has started and that train one model together, on torch.distributed."""
