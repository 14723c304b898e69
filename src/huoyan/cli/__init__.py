"""The command `huoyan`: one file a command; heavy imports stay inside the functions."""
