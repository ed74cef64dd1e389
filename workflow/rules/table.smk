rule sample_archs:
    input:
        device=DEVICE,
    output:
        archs="<results>/sample_archs/archs.parquet",
    log:
        "<logs>/sample_archs.log",
    benchmark:
        "<benchmarks>/sample_archs.tsv"
    priority: 2
    conda:
        "../../environment.yml"
    resources:
        mem_mb=per_attempt(2000),
        runtime=30,
    params:
        settings=settings("sample_archs"),
        seed=run.seed,
    shell:
        "python -m proard.stages.sample_archs --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --archs {output.archs:q} 2>&1 | tee {log:q}"


# One thread per shard: on a CPU, parallel shards are faster than one shard on many threads.
rule evaluate_archs:
    input:
        supernet=SUPERNET,
        archs=rules.sample_archs.output.archs,
        train=rules.prepare_data.output.train,
        val=rules.prepare_data.output.val,
    output:
        table="<results>/evaluate_archs/{shard}/table.parquet",
    log:
        "<logs>/evaluate_archs/{shard}.log",
    benchmark:
        "<benchmarks>/evaluate_archs/{shard}.tsv"
    priority: 2
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(480),
        gpu=1,
    params:
        settings=settings("evaluate_archs"),
        seed=run.seed,
        cache=CACHE,
    shell:
        "python -m proard.stages.evaluate_archs --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --supernet {input.supernet:q} --archs {input.archs:q}"
        " --train {input.train:q} --val {input.val:q} --shard {wildcards.shard} --cache {params.cache:q}"
        " --table {output.table:q} 2>&1 | tee {log:q}"


rule evaluate:
    input:
        collect("<results>/evaluate_archs/{shard}/table.parquet", shard=shards()),


rule merge_table:
    input:
        shards=rules.evaluate.input,
        archs=rules.sample_archs.output.archs,
    output:
        table="<results>/merge_table/table.parquet",
    log:
        "<logs>/merge_table.log",
    benchmark:
        "<benchmarks>/merge_table.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=per_attempt(4000),
        runtime=30,
    params:
        settings=settings("merge_table"),
        seed=run.seed,
        shards=lambda wildcards, input: str(Path(input.shards[0]).parents[1]),  # too many paths for a command line
        per_shard=run.evaluate_archs.archs_per_shard,
    shell:
        "python -m proard.stages.merge_table --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --shards {params.shards:q} --per-shard {params.per_shard}"
        " --archs {input.archs:q} --table {output.table:q} 2>&1 | tee {log:q}"


rule fit_predictor:
    input:
        table=rules.merge_table.output.table,
    output:
        predictor="<results>/fit_predictor/predictor.safetensors",
        quality="<results>/fit_predictor/quality.parquet",
        held_out="<results>/fit_predictor/held_out.parquet",
    log:
        "<logs>/fit_predictor.log",
    benchmark:
        "<benchmarks>/fit_predictor.tsv"
    conda:
        "../../environment.yml"
    threads: parallel_threads(4)
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(120),
    params:
        settings=settings("fit_predictor"),
        seed=run.seed,
    shell:
        "python -m proard.stages.fit_predictor --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --table {input.table:q}"
        " --predictor {output.predictor:q} --quality {output.quality:q} --held-out {output.held_out:q}"
        " 2>&1 | tee {log:q}"
