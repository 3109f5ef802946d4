"""The teacher: start a server and watch it, sample it, and keep every response in a ledger."""
