"""The registry's rows: what there is, who holds what, which jobs run.

`Catalog` has one part for each kind of row; every method of a part is one transaction, or takes
part in the one whose connection it is given. All of it but `listing` imports SQLAlchemy, and so is
only imported when a registry is first used.
"""
