"""The process around the app: uvicorn, supervisor, workers, watchdog."""
