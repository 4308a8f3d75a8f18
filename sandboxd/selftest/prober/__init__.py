"""What runs inside the sandboxes: the catalogue of probes, and the program that tries them.

Standard library only, and packed into one archive: the sandbox sees nothing of the broker's
packages. Outside, the same archive runs the positive controls, and the runner reads the catalogue.
"""
