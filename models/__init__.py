"""Reference models in plain Flax, one family a file: ``Config``, ``init``, ``apply``.

They know nothing of stfuse, as a tenant's own model would not.
"""
