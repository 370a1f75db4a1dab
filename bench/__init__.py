"""How fast it is: Darkroom beside the plain Flask and Celery app, in one table. `./dev bench` runs it."""
