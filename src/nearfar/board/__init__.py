"""The board: runs of nearfar and logs of other trainers in the browser, live while they train (``nearfar board``)."""
