"""Write a run, or several, as one HTML file: `pidistill report`.

Folders of runs enter, one file leaves. Read ``command.py`` first; ``read.py`` finds what a folder holds, ``encode.py`` makes
the rollouts small, and ``page/`` holds the template with its script. Curves are drawn by uPlot (MIT, 50 kB), because plotly's
smallest bundle is twenty times as large as all the rest of the page and draws nothing that the page needs.
"""
