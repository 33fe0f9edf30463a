# @title Trials side by side, and their differences in pairs
# canon: trials
def each(function, items, name):
    """{item: function(item)}, side by side; the progress bar bears the name."""
    return dict(zip(items, over_cores(function, items, name), strict=True))


def versus(first, second, digits=3):
    """The paired difference first - second of two lists, with its 95 % interval, as text."""
    mean, low, high = paired_interval(first, second)
    interval = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if len(first) > 1 else ", one seed"
    return f"{mean:+.{digits}f}{interval}"
