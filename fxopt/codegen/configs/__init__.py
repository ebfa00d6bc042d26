"""The cost model of printed nests: which launch configurations are worth measuring, best first."""
