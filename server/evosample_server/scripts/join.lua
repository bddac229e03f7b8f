-- Makes a rank a member of a run; a new run_id makes a new generation and moves the head to its position.
-- KEYS: head, claims, finished, epochs, plan (of the head as the caller read it)
-- ARGV: uid, epoch, state, plan_id, generation (of the head as the caller read it),
--       run_id, rank, world_size, claim, position given ('' or 'epoch step'), target epoch, target step
-- Returns {'joined', generation} or {what is wrong, ...}.
local h = redis.call('HMGET', KEYS[1], 'uid', 'epoch', 'state', 'plan_id', 'generation', 'run_id', 'world_size', 'run_position')
if h[1] ~= ARGV[1] then
  return {'gone'}
end
if h[2] ~= ARGV[2] or h[3] ~= ARGV[3] or h[4] ~= ARGV[4] or h[5] ~= ARGV[5] then
  return {'changed'}
end
local run_id, rank, world_size, claim, given = ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local target_epoch, target_step = ARGV[11], ARGV[12]

if h[6] == run_id then
  if h[7] ~= world_size then
    return {'world_size', h[7]}
  end
  if given ~= '' and target_epoch .. ' ' .. target_step ~= h[8] then
    return {'position', h[8]}
  end
  redis.call('HSET', KEYS[2], rank, claim)
  if h[3] == 'open' then
    redis.call('SREM', KEYS[3], rank) -- what its earlier process had finished, this one begins again
  end
  return {'joined', tonumber(h[5])}
end

if tonumber(target_epoch) < tonumber(h[2]) then
  local plan_id = redis.call('HGET', KEYS[4], target_epoch)
  if not plan_id then
    local oldest
    for _, epoch in ipairs(redis.call('HKEYS', KEYS[4])) do
      oldest = math.min(oldest or tonumber(epoch), tonumber(epoch))
    end
    return {'not_retained', tostring(oldest)}
  end
  for _, epoch in ipairs(redis.call('HKEYS', KEYS[4])) do
    if tonumber(epoch) > tonumber(target_epoch) then
      redis.call('HDEL', KEYS[4], epoch)
    end
  end
  redis.call('HSET', KEYS[1], 'epoch', target_epoch, 'plan_id', plan_id, 'state', 'unplanned')
elseif h[3] == 'open' then
  redis.call('HSET', KEYS[5], 'generation:' .. (h[5] + 1), world_size .. ' ' .. target_step)
end
redis.call('HSET', KEYS[1], 'generation', h[5] + 1, 'run_id', run_id, 'world_size', world_size,
  'run_position', target_epoch .. ' ' .. target_step, 'first_step', target_step)
redis.call('DEL', KEYS[2], KEYS[3])
redis.call('HSET', KEYS[2], rank, claim)
return {'joined', h[5] + 1}
