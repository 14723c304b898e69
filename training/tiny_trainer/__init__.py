"""How `tiny` is trained: examples to sequences, the loop, greedy answers, export. Run `training/train_tiny.py`."""
