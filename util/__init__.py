"""Everything that two scripts share. Imports nothing from models_*, main_*, eval_* or visualize."""
