"""What an agent acts in: environment builders, wrappers and the state of simulators."""


class UserError(ValueError):
    """Bad input; its message is one line that says what to do."""
