"""Calls a pickled (function, arguments) with this process's rank before them."""

import os
import pickle
import sys

function, arguments = pickle.loads(bytes.fromhex(sys.argv[1]))
function(int(os.environ["RANK"]), *arguments)
