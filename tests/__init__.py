"""The tests. They never wait for the network: the Hugging Face hub is used offline."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
