"""leanserve and its peers on the same applications, in turn; figures are compared as ratios only."""
