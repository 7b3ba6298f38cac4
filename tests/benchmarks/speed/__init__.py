"""lmdqn's speed and memory against what one would otherwise run; nothing of it asks the hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
