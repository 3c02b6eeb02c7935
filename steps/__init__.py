"""The pipeline's steps: plain functions that know nothing of the orchestrator that calls them."""
