"""The weekend version: what Flask's and Celery's own documentation lead to, as the measure of ours.

It is written as well as such an app usually is, with the settings that Celery's documentation recommends for tasks
that must not get lost. It keeps its jobs in Redis alone and its pictures as files. Both processes are started in a
folder that holds `baseline.json` (`redis_url`, `vendor_url`, `vendor_key`, `pictures`: a folder, `transport`: options).
"""
