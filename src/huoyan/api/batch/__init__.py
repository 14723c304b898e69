"""`huoyan batch`: many requests from a file to a file, going on where it was stopped."""
