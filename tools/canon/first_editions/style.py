# canon: style
%matplotlib inline
%config InlineBackend.figure_formats = ["png"]
plt.rcParams.update({
    "figure.figsize": (9, 3.6), "figure.dpi": 100, "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 11, "lines.linewidth": 1.8, "legend.frameon": False,
})
