"""Says, without torch and in under a second, whether a request fits a machine and how it runs."""
