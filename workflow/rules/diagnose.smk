# Networks beside the teacher; `all` asks for them, through the report, where the config lists any.


rule diagnose:
    input:
        teacher=rules.train_teacher.output.teacher,
        test=rules.prepare_data.output.test,
        weights=weights_to_diagnose,
        supernet=supernet_to_diagnose,
        train=images_of_supernet_to_diagnose,
    output:
        bound="<results>/diagnose/{network}/bound.parquet",
        radii="<results>/diagnose/{network}/radii.parquet",
        summary="<results>/diagnose/{network}/summary.parquet",
    log:
        "<logs>/diagnose/{network}.log",
    benchmark:
        "<benchmarks>/diagnose/{network}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(240),
        gpu=1,
    params:
        settings=diagnose_settings,
        seed=run.seed,
        weights=lambda wildcards, input: f"--weights {quote(str(input.weights))}" if input.weights else "",
        supernet=lambda wildcards, input: (
            f"--supernet {input.supernet} --train {input.train}" if input.supernet else ""
        ),
    shell:
        "python -m proard.stages.diagnose --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --teacher {input.teacher:q} --test {input.test:q}"
        " {params.weights} {params.supernet}"
        " --bound {output.bound:q} --radii {output.radii:q} --summary {output.summary:q} 2>&1 | tee {log:q}"


rule compare_diagnoses:
    input:
        bounds=collect("<results>/diagnose/{network}/bound.parquet", network=DIAGNOSED),
        radii=collect("<results>/diagnose/{network}/radii.parquet", network=DIAGNOSED),
        summaries=collect("<results>/diagnose/{network}/summary.parquet", network=DIAGNOSED),
    output:
        bound="<results>/compare_diagnoses/bound.parquet",
        radii="<results>/compare_diagnoses/radii.parquet",
        summary="<results>/compare_diagnoses/summary.parquet",
        pairs="<results>/compare_diagnoses/pairs.parquet",
        bound_figure="<results>/compare_diagnoses/bound.svg",
        radius_figure="<results>/compare_diagnoses/radius.svg",
    log:
        "<logs>/compare_diagnoses.log",
    benchmark:
        "<benchmarks>/compare_diagnoses.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=per_attempt(4000),
        runtime=30,
    params:
        settings=settings("compare_diagnoses"),
        seed=run.seed,
    shell:
        "python -m proard.stages.compare_diagnoses --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --bounds {input.bounds:q} --radii {input.radii:q}"
        " --summaries {input.summaries:q} --bound-table {output.bound:q} --radii-table {output.radii:q}"
        " --summary {output.summary:q} --pairs {output.pairs:q} --bound-figure {output.bound_figure:q}"
        " --radius-figure {output.radius_figure:q} 2>&1 | tee {log:q}"
