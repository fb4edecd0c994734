"""What a run will need and how fast it will be, from shapes alone: no weight is read and torch is not imported.

shape.py    the model's layers, from its config.json
setup.py    what decides memory and speed besides the shape: engine, policy, loss, type
stored.py   weights, adapter, gradients, optimizer state: exact, byte for byte
working.py  activations, loss, buffers: counted tensor by tensor, and held to what was measured
memory.py   both, at each moment of a step; the peak is the largest moment
speed.py    tokens per second, from the GPU's ceilings
advise.py   what to change where it does not fit
measured.py what this machine's own runs needed, which corrects the next prediction
"""
