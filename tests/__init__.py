"""The tests. They never wait for the network: what comes from the Hugging Face hub is asked for offline."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
