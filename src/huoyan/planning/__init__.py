"""What a model takes of a device's memory, and what fits: used by `huoyan plan` and obeyed by the engine.

Nothing here imports torch or touches a device; sizes are whole bytes.
"""
