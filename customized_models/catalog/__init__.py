"""The registry's rows: database, transactions, leases, listings."""
