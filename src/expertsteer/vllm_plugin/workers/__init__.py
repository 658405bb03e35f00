"""The worker classes that the configuration names, one a platform."""
