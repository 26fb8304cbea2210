"""What models are trained for: each objective is one module here that defines `OBJECTIVE`.

docs/adding-an-objective.md walks through one.
"""
