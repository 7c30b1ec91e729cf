"""What surrounds a language model: log-probabilities, sampler, tasks, rewards, evaluation."""


class UserError(ValueError):
    """Bad input; its message is one line that says what to do."""
