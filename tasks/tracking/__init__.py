"""A sweep shown in MLflow."""
