"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Bad input, told in one sentence that names the file, key or line and what would be right.

    The command line prints the sentence and exits with code 2; from Python it is an ordinary exception.
    """
