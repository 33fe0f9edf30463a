# @title Comparing networks picture by picture
# canon: compare
import numpy as np
import torch


def compared(first, second):
    """(mean, low, high, seeds) of first - second, bool (seeds, pictures), in points.

    The interval is over pictures; seeds: how many have the sign of the mean.
    """
    difference = 100 * (first.cpu().double() - second.cpu().double())
    mean, low, high = paired_interval(difference.mean(0), torch.zeros(difference.shape[1]))
    return mean, low, high, int((difference.mean(1).sign() == np.sign(mean)).sum())
