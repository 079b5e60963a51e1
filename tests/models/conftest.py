"""One thread is enough for tiny models: on busy cores, several mostly wait for each other."""

import torch

torch.set_num_threads(1)
