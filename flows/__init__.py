"""The orchestration: the only package that knows Prefect."""
