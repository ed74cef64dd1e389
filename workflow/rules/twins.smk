# Subnets of the supernet beside networks of the same arch trained alone, by the rule train_student; `all` asks for none.
rule measure_twin:
    input:
        supernet=SUPERNET,
        twin="<results>/train_student/{twin}/student.safetensors",
        train=rules.prepare_data.output.train,
        val=rules.prepare_data.output.val,
        test=rules.prepare_data.output.test,
    output:
        outcomes="<results>/measure_twin/{twin}/outcomes.parquet",
    log:
        "<logs>/measure_twin/{twin}.log",
    benchmark:
        "<benchmarks>/measure_twin/{twin}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(480),
        gpu=1,
    params:
        settings=settings("measure_twin"),
        seed=run.seed,
        cache=CACHE,
    shell:
        "python -m proard.stages.measure_twin --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --supernet {input.supernet:q} --twin {input.twin:q}"
        " --train {input.train:q} --val {input.val:q} --test {input.test:q}"
        " --cache {params.cache:q} --outcomes {output.outcomes:q} 2>&1 | tee {log:q}"


rule measure_twins:
    input:
        collect("<results>/measure_twin/{twin}/outcomes.parquet", twin=TWINS),


rule compare_twins:
    input:
        outcomes=collect("<results>/measure_twin/{twin}/outcomes.parquet", twin=TWINS),
    output:
        table="<results>/compare_twins/table.parquet",
        figure="<results>/compare_twins/gap.svg",
    log:
        "<logs>/compare_twins.log",
    benchmark:
        "<benchmarks>/compare_twins.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=per_attempt(4000),
        runtime=30,
    params:
        settings=settings("compare_twins"),
        seed=run.seed,
    shell:
        "python -m proard.stages.compare_twins --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --outcomes {input.outcomes:q}"
        " --table {output.table:q} --figure {output.figure:q} 2>&1 | tee {log:q}"
