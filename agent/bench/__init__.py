"""What the mesh costs, measured beside no mesh and beside Envoy, in one run on one machine.

    tools       the programs that generate load, and Envoy: found, built, their versions
    envoy       the configuration of an Envoy pair that speaks HBONE
    ztunnel     that of a ztunnel, and what it is told of its pod
    servers     programs that are started and waited for
    ground      a lab with every path in it: pods, servers, Envoys
    measures    what is measured, one cell at a time
    results     samples to rows: medians, spread, ratios
    plot        rows to a picture
    run         rounds over all of it

Every cell of a round is measured once on each path before the next one, so that what else the
machine does in a moment hits all paths alike. docs/performance.md has the method and its limits.
"""
