"""Reports as one self-contained HTML page: `page.render` makes the page, `plots.plot_data` the data of its plots."""
