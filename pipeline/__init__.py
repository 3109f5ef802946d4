"""The chain: stages, artifacts, the runner, the planner, the scores and the command line."""
