rule report:
    input:
        manifest=rules.prepare_data.output.manifest,
        teacher_history=rules.train_teacher.output.history,
        control_table=rules.train_control.output.table,
        control_history=rules.train_control.output.history,
        phase_histories=collect("<results>/train_phase/{phase}/history.parquet", phase=PHASES),
        table=rules.merge_table.output.table,
        quality=rules.fit_predictor.output.quality,
        held_out=rules.fit_predictor.output.held_out,
        archive=rules.search_front.output.archive,
        front=rules.search_front.output.front,
        search_history=rules.search_front.output.history,
        verified=rules.verify_front.output.table,
        students=collect("<results>/select_student/{budget}/student.parquet", budget=BUDGETS),
        cards=collect("<results>/export_student/{budget}/parity.json", budget=BUDGETS),
        autoattacked=collect("<results>/autoattack_student/{budget}/table.parquet", budget=AUTOATTACKED),
        checked=collect("<results>/check_student/{budget}/checks.parquet", budget=CHECKED),
        quantised=collect("<results>/quantize_student/{budget}/table.parquet", budget=BUDGETS),
        deployed=collect("<results>/executorch_student/{budget}/table.parquet", budget=IN_EXECUTORCH),
        trained_students=rules.compare_experiment.output.table if ALONE else [],
        diagnosis_summary=rules.compare_experiment.output.diagnosis if NETWORKS else [],
        diagnosis_radii=rules.compare_experiment.output.radii if NETWORKS else [],
        diagnosis_pairs=rules.compare_experiment.output.pairs if NETWORKS else [],
    output:
        html=report("<results>/report/report.html", caption="../report/report.rst", category="Report"),
        front_figure="<results>/report/front.svg",
        training_figure="<results>/report/training.svg",
        predictor_figure="<results>/report/predictor.svg",
        search_figure="<results>/report/search.svg",
        costs_figure="<results>/report/costs.svg",
    log:
        "<logs>/report.log",
    benchmark:
        "<benchmarks>/report.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=per_attempt(4000),
        runtime=30,
    params:
        settings=settings("report"),
        seed=run.seed,
        benchmarks=f"results/{run.run}/benchmarks",
        ledgers=lambda wildcards, output: str(Path(output.html).parents[1]),
        compared=lambda wildcards, input: flags_of(
            input, "trained_students", "diagnosis_summary", "diagnosis_radii", "diagnosis_pairs"
        ),
    shell:
        "python -m proard.stages.report --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --manifest {input.manifest:q}"
        " --teacher-history {input.teacher_history:q} --control-table {input.control_table:q}"
        " --control-history {input.control_history:q} --phase-histories {input.phase_histories:q}"
        " --table {input.table:q} --quality {input.quality:q} --held-out {input.held_out:q}"
        " --archive {input.archive:q} --front {input.front:q} --search-history {input.search_history:q}"
        " --verified {input.verified:q} --students {input.students:q} --cards {input.cards:q}"
        " --autoattacked {input.autoattacked:q} --checked {input.checked:q}"
        " --quantised {input.quantised:q} --deployed {input.deployed:q}"
        " {params.compared}"
        " --benchmarks {params.benchmarks:q} --ledgers {params.ledgers:q} --html {output.html:q}"
        " --front-figure {output.front_figure:q} --training-figure {output.training_figure:q} --predictor-figure {output.predictor_figure:q}"
        " --search-figure {output.search_figure:q} --costs-figure {output.costs_figure:q} 2>&1 | tee {log:q}"
