"""Measurements, as ratios within one run. Nothing here is a test, and no test is timed.

``stage``     daemons as they are shipped, and one that launches through bwrap
``walls``     whether what is measured is isolated as shipped: an invalid run says so
``measure``   interleaved runs, and what is made of their times
``launching`` ``calls`` ``idle`` ``starts``   the parts
``stages``    where one call's time goes
``peers``     programs that isolate too, each as near to ours as it allows
``report``    the goals, the table, docs/performance.md; ``plot`` draws it
"""
