"""Reports as one self-contained HTML page: `page.render` makes it, `plots.plot_data` says what its plots show."""
