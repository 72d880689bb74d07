"""What runs inside the sandbox: the standard library alone, in a process of its own.

`hyper_tune.evaluate.sandbox` starts it as a package called ``jail``, without ``hyper_tune``.
"""
