"""Imports the package before pytest imports its files one by one for the examples in them.

Under import-mode importlib, a file whose package is not yet imported is executed twice: once by the
package, once by pytest. Classes of the two do not equal each other.
"""

import dora_jax  # noqa: F401
