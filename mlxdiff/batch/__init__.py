"""Many runs from one request: files of prompts, presets, wildcards, axes; models that stay loaded.

``jobs.expand`` makes a list of jobs of all that is asked for. The command line and the server draw
them one after the other.
"""
