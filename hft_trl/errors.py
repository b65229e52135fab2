"""The one exception for mistakes that a user can mend."""


class HFTError(ValueError):
    """
    A mistake in what the user asked for: a setting, a data set, a model or a folder.

    The message is one line that names the thing, the value that was seen and the way to mend it. Recipes and the
    command line print it without a traceback and exit with code 2.
    """
